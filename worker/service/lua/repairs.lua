-- The operations of the janitor, the deliverer and the sessions. The janitor's can be repeated by any
-- process at any time: each checks again before it moves anything.

function op.due(now)
  local ids = redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', now, 'LIMIT', 0, 1000)
  for _, id in ipairs(ids) do
    redis.call('ZREM', P .. 'due', id)
    local job = load_job(id)
    if job and job.state == 'queued' then enqueue(job, true) end
  end
  for _, priority in ipairs(C.priorities) do refill(priority) end
  return ids
end

-- The clock went back: what was written by the old clock would stay in the future for that long.
-- Leases begin again, and what is due later moves back by the same time.
local function follow_clock(now, back)
  for _, priority in ipairs(C.priorities) do
    local running = P .. 'running:' .. priority
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', running, now + C.lease, '+inf')) do
      redis.call('ZADD', running, now + C.lease, id)
    end
  end
  for _, name in ipairs({'due', 'outbox', 'sessions:changed'}) do
    local later = redis.call('ZRANGEBYSCORE', P .. name, now, '+inf', 'WITHSCORES')
    for i = 1, #later, 2 do
      redis.call('ZADD', P .. name, math.max(now, tonumber(later[i + 1]) - back), later[i])
    end
  end
  redis.call('DEL', P .. 'popped')
end

-- Before a sweep: whether it is time for one, and what the pause before it means. When there was none
-- for long, Redis or all janitors were away, and no worker could send a heartbeat. So every running
-- job gets half a lease more before it counts as lost.
function op.awake(now, every)
  local last = tonumber(redis.call('GET', P .. 'swept') or nil)
  if last and last <= now and now - last < tonumber(every) then return 0 end
  redis.call('SET', P .. 'swept', now)
  if last and last > now then follow_clock(now, last - now) end
  if not last or now - last <= C.lease / 2 then return 1 end
  local grace = now + C.lease / 2
  for _, priority in ipairs(C.priorities) do
    local running = P .. 'running:' .. priority
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', running, '-inf', grace)) do
      redis.call('ZADD', running, grace, id)
    end
  end
  return 1
end

function op.lost(now)
  local report = {}
  for _, priority in ipairs(C.priorities) do
    local running = P .. 'running:' .. priority
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', running, '-inf', now, 'LIMIT', 0, 200)) do
      local job = load_job(id)
      if job and job.state == 'running' then
        -- One job that cannot be moved must not keep the others from being found.
        local ok, outcome = pcall(crash, job, now, 'worker_lost', 'worker ' .. job.worker ..
          ' sent no heartbeat for ' .. C.lease .. ' s', '', false)
        report[#report + 1] = id
        report[#report + 1] = ok and outcome or 'stuck'
      else
        redis.call('ZREM', running, id)
      end
    end
  end
  return report
end

function op.reclaim(now, priority)
  local popped, reclaimed = popped_key(priority), {}
  for _, id in ipairs(redis.call('LRANGE', popped, 0, -1)) do
    local job = load_job(id)
    if not job or job.state ~= 'queued' then
      redis.call('LREM', popped, 0, id)
      redis.call('HDEL', P .. 'popped', id)
    elseif redis.call('HSETNX', P .. 'popped', id, now) == 0
        and now - tonumber(redis.call('HGET', P .. 'popped', id)) >= C.reclaim then
      redis.call('LREM', popped, 0, id)
      redis.call('HDEL', P .. 'popped', id)
      enqueue(job, true)
      reclaimed[#reclaimed + 1] = id
    end
  end
  refill(priority)
  return reclaimed
end

function op.expire(now)
  local expired = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', now, 'LIMIT', 0, 1000)) do
    local job = load_job(id)
    if not job then
      redis.call('ZREM', P .. 'deadlines', id)
    elseif job.state == 'queued' then
      too_late(job, now)
      unlist(job, true)
      expired[#expired + 1] = id
    end
  end
  return expired
end

-- RQ forgets dead workers only when another of its own kind cleans up. Each worker renews its record's
-- time to live with every heartbeat; a record without one gets a lease, or it would count for ever.
function op.workers(now, priority)
  local gone = 0
  local all = 'rq:workers:' .. C.queue .. priority
  for _, key in ipairs(redis.call('SMEMBERS', all)) do
    local left = redis.call('PTTL', key)
    if left == -1 then
      redis.call('PEXPIRE', key, math.ceil(1000 * C.lease))
    elseif left == -2 then
      redis.call('SREM', all, key)
      redis.call('SREM', 'rq:workers', key)
      gone = gone + 1
    end
  end
  if redis.call('EXISTS', queue_key(priority)) == 0 then
    redis.call('DEL', ranks_key(priority)) -- of entries that somebody removed
  end
  redis.call('ZREMRANGEBYSCORE', 'rq:wip:' .. C.queue .. priority, 0, now)
  return gone
end

-- How many more jobs are queued than are in a place; 0 means that no search is needed.
function op.audit(now)
  local missing = -redis.call('ZCARD', P .. 'due')
  for _, priority in ipairs(C.priorities) do
    missing = missing + redis.call('ZCARD', P .. 'waiting:' .. priority)
      + redis.call('SCARD', P .. 'stale:' .. priority)
      - redis.call('LLEN', queue_key(priority)) - redis.call('LLEN', popped_key(priority))
    for _, tenant in ipairs(redis.call('LRANGE', P .. 'turn:' .. priority, 0, -1)) do
      missing = missing - redis.call('LLEN', P .. 'pending:' .. priority .. ':' .. tenant)
    end
  end
  return missing
end

function op.rescue(now, id, priority)
  local job = load_job(id)
  if not job or job.state ~= 'queued' then
    redis.call('ZREM', P .. 'waiting:' .. priority, id)
    return 'forgotten'
  end
  if redis.call('LPOS', pending_key(job), id) then
    take_turn(job)
    refill(priority)
  elseif not redis.call('LPOS', queue_key(priority), id)
      and not redis.call('LPOS', popped_key(priority), id)
      and not redis.call('ZSCORE', P .. 'due', id) then
    enqueue(job, true)
    refill(priority)
    return 'rescued'
  end
  return 'fine'
end

-- The outbox: a taken delivery comes back by itself when its deliverer dies.
function op.take(now, limit, lease)
  local taken = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'outbox', '-inf', now, 'LIMIT', 0, limit)) do
    local key = P .. 'delivery:' .. id
    if redis.call('EXISTS', key) == 1 then
      redis.call('HINCRBY', key, 'attempts', 1)
      redis.call('ZADD', P .. 'outbox', now + tonumber(lease), id)
      taken[#taken + 1] = redis.call('HGETALL', key)
    else
      redis.call('ZREM', P .. 'outbox', id)
    end
  end
  return taken
end

-- Give a taken delivery back untried; sent twice, it takes one attempt off.
function op.put_off(now, id, at)
  local due = redis.call('ZSCORE', P .. 'outbox', id)
  if not due or tonumber(due) == tonumber(at) then return 0 end
  redis.call('ZADD', P .. 'outbox', at, id)
  redis.call('HINCRBY', P .. 'delivery:' .. id, 'attempts', -1)
  return 1
end

-- Postpone a delivery that is still in the outbox, or make it a dead letter.
function op.settle(now, id, place, at, error)
  if not redis.call('ZSCORE', P .. 'outbox', id) then return 0 end
  redis.call('ZREM', P .. 'outbox', id)
  redis.call('ZADD', P .. place, at, id)
  redis.call('HSET', P .. 'delivery:' .. id, 'error', error)
  while redis.call('ZCARD', P .. 'dead') > C.dead_most do
    redis.call('DEL', P .. 'delivery:' .. redis.call('ZPOPMIN', P .. 'dead')[1])
  end
  return 1
end

-- A delivery that needs no more pushes, or a dead letter that nobody wants; forget it.
function op.forget(now, place, id)
  local found = redis.call('ZREM', P .. place, id)
  redis.call('DEL', P .. 'delivery:' .. id)
  return found
end

function op.disable(now, endpoint)
  return redis.call('HSET', P .. 'endpoints:disabled', endpoint, now)
end

function op.revive(now, id)
  if redis.call('ZREM', P .. 'dead', id) == 0 then return 0 end
  redis.call('HSET', P .. 'delivery:' .. id, 'attempts', 0)
  redis.call('ZADD', P .. 'outbox', now, id)
  return 1
end

-- Write a fold, unless a segment came in since it was read.
function op.fold(now, tenant, session_id, revision, document, facts, alert)
  local name = tenant .. ':' .. session_id
  local key = P .. 'session:' .. name
  local seen = redis.call('HMGET', key, 'revision', 'folded', 'callback')
  if not seen[1] then
    redis.call('ZREM', P .. 'sessions:changed', name)
    return 1
  end
  if seen[1] ~= revision then return 0 end
  if seen[2] == revision then
    redis.call('ZREM', P .. 'sessions:changed', name)
    return 1
  end
  redis.call('XADD', P .. 'verdicts', 'MAXLEN', '~', C.stream, '*', 'type', 'session.updated',
    'session_id', session_id, 'tenant', tenant, 'data', facts)
  redis.call('ZREM', P .. 'sessions:changed', name)
  redis.call('HSET', key, 'folded', revision, 'verdict', document)
  if alert == '1' and redis.call('HSETNX', key, 'alerted_at', now) == 1 then
    redis.call('XADD', P .. 'verdicts', 'MAXLEN', '~', C.stream, '*', 'type', 'session.alert',
      'session_id', session_id, 'tenant', tenant, 'data', facts)
    post('session.alert', decoded(seen[3] or ''), tenant, session_id, facts, now)
  end
  notify('session:' .. name, 'updated')
  return 1
end

local now = tonumber(ARGV[2])
if not now then
  local clock = redis.call('TIME')
  now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
end
-- With Redis' memory full only submissions are refused, and running jobs may end: Redis stops a script
-- at a write that needs memory only while the script has written nothing. DEL needs no memory.
NOW = now
if ARGV[1] ~= 'submit' then
  local refused = refused_write('DEL', P .. 'nothing')
  if refused then return refused end
end
return op[ARGV[1]](now, unpack(ARGV, 3))
