-- Where jobs are, and how they move. store.py joins this file, claims.lua and repairs.lua into one
-- script, with the table C (constants) before it; this file holds what the two others share.
--
-- Where a job that has not ended is, exactly one of:
--   pending:PRIORITY:TENANT   waiting its tenant's turn (list)
--   rq:queue:…                next for any worker; rq:queue:…:intermediate: popped, not yet begun
--   due                       waiting for its retry (zset by time)
--   running:PRIORITY          begun (zset by the end of its lease)
-- stale:PRIORITY (set) names the entries of pending lists whose jobs have ended.
-- waiting:PRIORITY (zset by submission) holds all queued jobs, so that a lost one can be found.

local P = C.prefix
-- The script's time, set where it begins (repairs.lua).
local NOW = 0
local FIELDS = {'state', 'tenant', 'priority', 'token', 'tag', 'callback', 'session', 'claim',
  'attempts', 'retries', 'worker', 'cancel', 'deadline', 'file_sha', 'alone', 'run_alone',
  'crashes', 'submitted_at', 'created', 'function', 'claimed_sha', 'started_at'}

local function job_key(id) return P .. 'job:' .. id end
local function queue_key(priority) return 'rq:queue:' .. C.queue .. priority end
local function popped_key(priority) return queue_key(priority) .. ':intermediate' end
local function pending_key(job) return P .. 'pending:' .. job.priority .. ':' .. job.tenant end

local function load_job(id)
  local values = redis.call('HMGET', job_key(id), unpack(FIELDS))
  if not values[1] then return nil end
  local job = {id = id}
  for i, name in ipairs(FIELDS) do job[name] = values[i] or '' end
  return job
end

-- A script's first write, done in a way that shows the client Redis' plain error: after a fail-over
-- READONLY tells it to connect again, and Redis 6 hides that word in the text of a script's error.
local function refused_write(...)
  local reply = redis.pcall(...)
  if type(reply) ~= 'table' or not reply.err then return nil end
  if string.find(reply.err, 'READONLY', 1, true) then
    return redis.error_reply('READONLY this Redis is a replica now')
  end
  return reply
end

local function notify(id, state) redis.call('PUBLISH', P .. 'watch:' .. id, state) end

-- What RQ's dequeue and `rq info` read; written again when it is gone.
local function show_to_rq(job, status)
  local key = 'rq:job:' .. job.id
  -- Another client may have put another type there; an error would stop the move half way.
  if redis.call('TYPE', key).ok ~= 'hash' then redis.call('DEL', key) end
  if redis.call('EXISTS', key) == 0 then
    redis.call('HSET', key, 'created_at', job.created, 'enqueued_at', job.created,
      'data', cjson.encode({job['function'], cjson.null, {job.id}, {}}),
      'origin', C.queue .. job.priority, 'description', job['function'] .. '(' .. job.id .. ')',
      'timeout', C.rq_timeout, 'result_ttl', C.rq_ttl, 'failure_ttl', C.rq_ttl)
  end
  redis.call('HSET', key, 'status', status, 'worker_name', job.worker)
end

-- Whom a job counts for. A tenant's backfill counts by itself: re-judging its archive must not push its
-- uploads behind those of others. No tenant's name has a colon.
local function party(tenant, priority)
  return priority == 'backfill' and 'backfill:' .. tenant or tenant
end

-- Jobs of a tenant that are in RQ's list, popped or running.
local function active_key(tenant, priority) return P .. 'active:' .. party(tenant, priority) end
local function used_key(tenant, priority) return P .. 'used:' .. party(tenant, priority) end
local function ranks_key(priority) return P .. 'rank:' .. priority end

local function is_at_cap(tenant, priority)
  return C.tenant_running > 0
    and redis.call('SCARD', active_key(tenant, priority)) >= C.tenant_running
end

-- Fairness. RQ's list is ordered by rank: how many workers a tenant holds or will hold, and how long it
-- held some of late. So who used much waits behind who used little, and among equals the first
-- comes first. rank:PRIORITY (zset) has the ranks of the list's entries.
local function held_of_late(tenant, used)
  local age = math.max(0, NOW - (tonumber(used[2]) or NOW))
  return (tonumber(used[1]) or 0) * math.exp(-age / C.fair_over)
end

local function rank_of(tenant, priority)
  local used = redis.call('HMGET', used_key(tenant, priority), 'seconds', 'at', 'last:' .. priority)
  -- In seconds that others may come later and still go before. A worker that is held now counts ten;
  -- what was used counts in steps of five, since milliseconds must not decide. The sum has a bound, so
  -- that no job waits for ever behind new ones.
  local of_late = 5 * math.floor(held_of_late(tenant, used) / 5)
  local behind = 10 * redis.call('SCARD', active_key(tenant, priority)) + of_late
  local rank = NOW + math.min(C.fair_over, behind)
  -- No job overtakes an earlier one of its own tenant.
  local before = used[3] and redis.call('ZSCORE', ranks_key(priority), used[3])
  return math.max(rank, before and tonumber(before) or 0)
end

-- A run has ended: the tenant held a worker since it began.
local function charge(job)
  local began = tonumber(job.started_at)
  job.started_at = ''
  if job.state ~= 'running' or not began then return end
  local key = used_key(job.tenant, job.priority)
  local used = redis.call('HMGET', key, 'seconds', 'at')
  redis.call('HSET', key, 'at', NOW, 'seconds',
    held_of_late(job.tenant, used) + math.max(0, NOW - began))
  redis.call('EXPIRE', key, 10 * C.fair_over)
end

-- Into RQ's list, before the first entry of a higher rank.
local function list(tenant, priority, id, rank)
  local queue, ranks = queue_key(priority), ranks_key(priority)
  local placed = false
  while not placed do
    local text = string.format('(%.17g', rank)
    local after = redis.call('ZRANGEBYSCORE', ranks, text, '+inf', 'LIMIT', 0, 1)[1]
    if not after then
      redis.call('RPUSH', queue, id)
      placed = true
    elseif redis.call('LINSERT', queue, 'BEFORE', after, id) > 0 then
      placed = true
    else
      redis.call('ZREM', ranks, after) -- a worker has popped it, or somebody removed it
    end
  end
  redis.call('ZADD', ranks, string.format('%.17g', rank), id)
  redis.call('SADD', active_key(tenant, priority), id)
  redis.call('EXPIRE', active_key(tenant, priority), 2 * C.rq_timeout)
  redis.call('HSET', used_key(tenant, priority), 'last:' .. priority, id)
  redis.call('EXPIRE', used_key(tenant, priority), 10 * C.fair_over)
end

local function room_in(priority)
  local workers = redis.call('SCARD', 'rq:workers:' .. C.queue .. priority)
  if priority == 'backfill' then -- those of default take it when they have nothing else
    workers = workers + redis.call('SCARD', 'rq:workers:' .. C.queue .. 'default')
  end
  return 1 + math.max(1, workers) - redis.call('LLEN', queue_key(priority))
end

-- Fill RQ's list, one tenant after the other, until it holds one job more than there are workers: none
-- idles, and few jobs have their rank from long ago.
local function refill(priority)
  local turn, stale = P .. 'turn:' .. priority, P .. 'stale:' .. priority
  local room = room_in(priority)
  local moved, skipped, capped = 0, 0, 0
  local tenants = redis.call('LLEN', turn)
  while moved < room and skipped < 5000 and capped <= tenants do
    local tenant = redis.call('LPOP', turn)
    if not tenant then
      redis.call('DEL', stale)
      break
    end
    local pending = P .. 'pending:' .. priority .. ':' .. tenant
    local wait = is_at_cap(tenant, priority)
    local id = not wait and redis.call('LPOP', pending)
    if wait then
      redis.call('RPUSH', turn, tenant)
      capped = capped + 1
    elseif id then
      local ended = redis.call('SREM', stale, id) == 1
      if ended then
        skipped = skipped + 1
      else
        list(tenant, priority, id, rank_of(tenant, priority))
        moved = moved + 1
      end
      if redis.call('EXISTS', pending) == 1 then
        redis.call(ended and 'LPUSH' or 'RPUSH', turn, tenant)
      end
    end
  end
  return moved
end

local function take_turn(job)
  local turn = P .. 'turn:' .. job.priority
  if not redis.call('LPOS', turn, job.tenant) then redis.call('RPUSH', turn, job.tenant) end
end

local function enqueue(job, first)
  redis.call('SREM', active_key(job.tenant, job.priority), job.id)
  redis.call('SADD', 'rq:queues', queue_key(job.priority))
  show_to_rq(job, 'queued')
  if redis.call(first and 'LPUSH' or 'RPUSH', pending_key(job), job.id) == 1 then take_turn(job) end
end

-- A full list may be full of one tenant's jobs. A job that has just come from a tenant with a lower
-- rank takes the place of its last entry, which goes back to the front of its tenant's pending jobs.
local function overtake(job)
  if is_at_cap(job.tenant, job.priority) or room_in(job.priority) > 0 then return end
  local queue, pending = queue_key(job.priority), pending_key(job)
  -- Only the tenant's next job may; mostly it is this one.
  if redis.call('LINDEX', pending, 0) ~= job.id then return end
  local rank = rank_of(job.tenant, job.priority)
  local last = redis.call('LINDEX', queue, -1)
  local its_rank = last and redis.call('ZSCORE', ranks_key(job.priority), last)
  if not its_rank or tonumber(its_rank) <= rank then return end
  local other = load_job(last)
  if not other or other.tenant == job.tenant then return end
  redis.call('RPOP', queue)
  redis.call('ZREM', ranks_key(job.priority), last)
  enqueue(other, true)
  redis.call('LPOP', pending)
  if redis.call('EXISTS', pending) == 0 then
    redis.call('LREM', P .. 'turn:' .. job.priority, 0, job.tenant)
  end
  list(job.tenant, job.priority, job.id, rank)
end

-- A job whose worker died or stopped goes first: its client has waited for it already.
local function enqueue_first(job)
  redis.call('SADD', 'rq:queues', queue_key(job.priority))
  show_to_rq(job, 'queued')
  redis.call('LPUSH', queue_key(job.priority), job.id)
  redis.call('ZADD', ranks_key(job.priority), -1, job.id)
  redis.call('SADD', active_key(job.tenant, job.priority), job.id)
end

-- Remove a queued job from wherever it waits. With `lazily` its entry in a tenant's pending list is
-- only marked as stale, and refill() drops it: when a thousand deadlines pass at once, a thousand
-- searches of a long list would block Redis. The other lists are short.
local function unlist(job, lazily)
  local found = redis.call('LREM', queue_key(job.priority), 0, job.id)
    + redis.call('LREM', popped_key(job.priority), 0, job.id)
    + redis.call('ZREM', P .. 'due', job.id)
  if found == 0 and lazily then
    redis.call('SADD', P .. 'stale:' .. job.priority, job.id)
  elseif found == 0 then
    redis.call('LREM', pending_key(job), 0, job.id)
  end
  redis.call('HDEL', P .. 'popped', job.id)
  redis.call('ZREM', ranks_key(job.priority), job.id)
end

-- JSON that a client sent, decoded; nil when it is missing or not a table. Such a part of a job is
-- then left out, so that it cannot stop the job from ending.
local function decoded(text)
  if text == '' then return nil end
  local ok, value = pcall(cjson.decode, text)
  return ok and type(value) == 'table' and value or nil
end

local function is_free_or(kind, key)
  local found = redis.call('TYPE', key).ok
  return found == 'none' or found == kind
end

local function wants(callback, event)
  if not callback or type(callback.events) ~= 'table' then return false end
  for _, wanted in ipairs(callback.events) do
    if wanted == event then return type(callback.url) == 'string' end
  end
  return false
end

local function post(event, callback, tenant, subject, data, now)
  if not wants(callback, event) then return end
  -- The same end gives the same id, so that a receiver can tell a repeated delivery.
  local id = 'msg_' .. redis.sha1hex(tenant .. '\0' .. subject .. '\0' .. event)
  redis.call('HSET', P .. 'delivery:' .. id, 'id', id, 'event', event, 'tenant', tenant,
    'subject', subject, 'url', callback.url, 'secret_id', tostring(callback.secret_id),
    'data', data, 'created_at', now, 'attempts', 0)
  redis.call('ZADD', P .. 'outbox', now, id)
end

-- Store a segment's digest in its session; store.py folds the sessions marked as changed.
local function store_segment(job, part, now, digest, failed)
  local number = string.format('%.0f', part.number)
  local name = job.tenant .. ':' .. part.session_id
  local key = P .. 'session:' .. name
  if failed then
    if redis.call('HEXISTS', key, 'segment:' .. number) == 0 then
      redis.call('HSET', key, 'failed:' .. number, failed)
    end
  elseif redis.call('HSETNX', key, 'segment:' .. number, digest) == 1 then
    redis.call('HDEL', key, 'failed:' .. number)
    redis.call('HSET', key, 'order:' .. number, redis.call('HINCRBY', key, 'arrivals', 1))
  else
    redis.call('HINCRBY', key, 'repeated:' .. number, 1)
  end
  if part.last then redis.call('HSET', key, 'last', number) end
  if job.callback ~= '' then redis.call('HSET', key, 'callback', job.callback) end
  redis.call('HINCRBY', key, 'revision', 1)
  redis.call('EXPIRE', key, C.session_ttl)
  redis.call('ZADD', P .. 'sessions:changed', now, name)
end

-- The session part that can be stored, else nil.
local function segment_of(job)
  local part = decoded(job.session)
  if not part or type(part.number) ~= 'number' or type(part.session_id) ~= 'string' then
    return nil
  end
  return is_free_or('hash', P .. 'session:' .. job.tenant .. ':' .. part.session_id) and part
end

-- The one end of a job. `facts` is the JSON that stream and webhook show beside the job's names.
-- Redis does not undo what a script wrote before an error. So what comes from a client is read
-- first, and the write that can be refused, XADD, is the first one.
local function finish(job, now, state, facts, failure, verdict, evidence, digest)
  local id, key = job.id, job_key(job.id)
  local event = verdict and 'verdict.ready' or 'verdict.failed'
  local callback, part = decoded(job.callback), segment_of(job)
  local data = cjson.decode(facts)
  data.job_id, data.tenant, data.state = id, job.tenant, state
  data.tag = job.tag ~= '' and job.tag or cjson.null
  data.session = decoded(job.session)
  local trace = (decoded(redis.call('HGET', key, 'document') or '') or {}).traceparent
  if type(trace) == 'string' then data.traceparent = trace end
  -- A consumer of uploads leaves these out.
  if job.priority == 'backfill' then data.priority = job.priority end
  local text = cjson.encode(data)
  redis.call('XADD', P .. 'verdicts', 'MAXLEN', '~', C.stream, '*', 'type', event, 'job_id', id,
    'tenant', job.tenant, 'data', text)
  charge(job)
  redis.call('HSET', key, 'state', state, 'ended_at', now, 'facts', facts)
  redis.call('HDEL', key, 'claim', 'partial', 'next_attempt_at')
  if failure then redis.call('HSET', key, 'failure', failure) end
  redis.call('EXPIRE', key, C.job_ttl)
  redis.call('EXPIRE', P .. 'token:' .. job.tenant .. ':' .. job.token, C.token_ttl)
  redis.call('ZREM', P .. 'waiting:' .. job.priority, id)
  redis.call('ZREM', P .. 'running:' .. job.priority, id)
  redis.call('SREM', active_key(job.tenant, job.priority), id)
  redis.call('ZREM', P .. 'deadlines', id)
  if verdict then redis.call('SET', P .. 'verdict:' .. id, verdict, 'EX', C.verdict_ttl) end
  if evidence then redis.call('SET', P .. 'evidence:' .. id, evidence, 'EX', C.evidence_ttl) end
  if state == 'succeeded' then
    redis.call('DEL', P .. 'crashes:job:' .. id)
    if job.file_sha ~= '' then redis.call('DEL', P .. 'crashes:workers:' .. job.file_sha) end
  end
  post(event, callback, job.tenant, id, text, now)
  if part then store_segment(job, part, now, digest, not verdict and data.code) end
  show_to_rq(job, verdict and 'finished' or (state == 'cancelled' and 'canceled' or 'failed'))
  redis.call('EXPIRE', 'rq:job:' .. id, C.rq_ttl)
  notify(id, state)
  return state
end

local function failure_of(job, code, message)
  return cjson.encode({code = code, message = message, attempts = tonumber(job.attempts) or 0})
end

local function fail(job, now, state, code, message)
  local failure = failure_of(job, code, message)
  return finish(job, now, state, failure, failure)
end

local function too_late(job, now)
  if job.deadline == '' or tonumber(job.deadline) > now then return nil end
  return fail(job, now, 'expired', 'deadline_passed',
    'the deadline passed before the job ended; submit it again with a later one')
end

-- running → queued, now or after a delay; a job that should stop ends instead.
-- first: it goes before all others. failure: of the run that ended, nil when it was not the job's.
local function requeue(job, now, delay, first, failure)
  job.worker = ''
  charge(job)
  local ended
  if job.cancel ~= '' then
    ended = fail(job, now, 'cancelled', 'cancelled', 'cancelled by the client')
  else
    ended = too_late(job, now)
  end
  redis.call('ZREM', P .. 'running:' .. job.priority, job.id)
  redis.call('HDEL', job_key(job.id), 'claim', 'worker', 'progress', 'partial')
  if ended then return ended end
  redis.call('HSET', job_key(job.id), 'state', 'queued', 'next_attempt_at', now + delay)
  if failure then redis.call('HSET', job_key(job.id), 'last_failure', failure) end
  redis.call('ZADD', P .. 'waiting:' .. job.priority, job.submitted_at, job.id)
  if delay > 0 then
    redis.call('SREM', active_key(job.tenant, job.priority), job.id)
    redis.call('ZADD', P .. 'due', now + delay, job.id)
    show_to_rq(job, 'scheduled')
  elseif first then
    enqueue_first(job)
  else
    enqueue(job, true)
  end
  refill(job.priority)
  notify(job.id, 'queued')
  return 'retried'
end

local function quarantine(job, now, code, message)
  local entry = cjson.encode({job_id = job.id,
    tenant = job.tenant, code = code, message = message, at = now,
    file_sha = job.file_sha ~= '' and job.file_sha or job.claimed_sha,
    attempts = tonumber(job.attempts) or 0,
    document = redis.call('HGET', job_key(job.id), 'document'),
    crashes = decoded(job.crashes) or cjson.null})
  local ended = fail(job, now, 'quarantined', code, message)
  redis.call('HSET', P .. 'quarantine', job.id, entry)
  redis.call('ZADD', P .. 'quarantine:at', now, job.id)
  while redis.call('ZCARD', P .. 'quarantine:at') > C.quarantine_most do
    redis.call('HDEL', P .. 'quarantine', redis.call('ZPOPMIN', P .. 'quarantine:at')[1])
  end
  return ended
end

-- The hash of the bytes as the worker computed it; what a client claims is charged for nothing.
local function note_file(job, file_sha)
  if file_sha == '' or file_sha == job.file_sha then return end
  job.file_sha = file_sha
  redis.call('HSET', job_key(job.id), 'file_sha', file_sha)
end

-- How many workers this file's bytes have crashed; one alone may have a broken machine.
local function workers_crashed(file_sha)
  if file_sha == '' then return 0 end
  return redis.call('SCARD', P .. 'crashes:workers:' .. file_sha)
end

local function count_crash(job, blame_file)
  local of_job = P .. 'crashes:job:' .. job.id
  local count = redis.call('INCR', of_job)
  redis.call('EXPIRE', of_job, C.crash_ttl)
  if not blame_file or job.file_sha == '' then return count end
  local of_file = P .. 'crashes:workers:' .. job.file_sha
  redis.call('SADD', of_file, job.worker)
  redis.call('EXPIRE', of_file, C.crash_ttl)
  return math.max(count, workers_crashed(job.file_sha))
end

-- A crash counts when the job was alone in its child, or was to run alone.
-- blame_file: the bytes may be the cause, and other jobs with them are counted together.
local function crash(job, now, code, message, detail, blame_file)
  local log = decoded(job.crashes) or {}
  log[#log + 1] = {code = code, message = message, detail = detail, at = now,
    worker = job.worker, attempt = tonumber(job.attempts), alone = job.alone == '1'}
  if #log > 10 then table.remove(log, 1) end
  job.crashes = cjson.encode(log)
  redis.call('HSET', job_key(job.id), 'crashes', job.crashes, 'run_alone', '1')
  if job.alone == '1' or job.run_alone == '1' then
    local count = count_crash(job, blame_file)
    if count >= C.quarantine_after then return quarantine(job, now, code, message) end
  end
  -- A worker that died took the job's time; a job whose child died waits its tenant's turn.
  return requeue(job, now, 0, code == 'worker_lost', failure_of(job, code, message))
end

-- The job, if it runs under this claim.
local function held(id, claim)
  local job = load_job(id)
  if job and job.state == 'running' and job.claim == claim then return job end
  return nil
end
