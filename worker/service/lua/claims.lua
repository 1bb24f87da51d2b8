-- What clients and workers ask for: one operation, one atomic step. Time comes in ARGV[2], or from
-- Redis when that is empty; no argument is ever nil, an empty string means none.

local op = {}

function op.submit(now, id, body, document, tenant, priority, token, tag, callback, session,
                   deadline, created, name, claimed_sha)
  local token_key = P .. 'token:' .. tenant .. ':' .. token
  local stored = redis.call('HMGET', token_key, 'job_id', 'body')
  if stored[1] then
    local old = redis.call('HMGET', job_key(stored[1]), 'state', 'document')
    if old[1] then
      return {stored[2] == body and 'existing' or 'conflict', stored[1], old[1], old[2]}
    end
  end
  local refused = refused_write('HSET', token_key, 'job_id', id, 'body', body)
  if refused then return refused end
  redis.call('PERSIST', token_key)
  redis.call('HSET', job_key(id), 'state', 'queued', 'document', document, 'tenant', tenant,
    'priority', priority, 'token', token, 'tag', tag, 'callback', callback, 'session', session,
    'deadline', deadline, 'submitted_at', now, 'created', created, 'function', name,
    'claimed_sha', claimed_sha, 'attempts', 0, 'retries', 0)
  redis.call('ZADD', P .. 'waiting:' .. priority, now, id)
  if deadline ~= '' then redis.call('ZADD', P .. 'deadlines', deadline, id) end
  enqueue({id = id, tenant = tenant, priority = priority, created = created, worker = '',
    ['function'] = name}, false)
  refill(priority)
  overtake({id = id, tenant = tenant, priority = priority})
  return {'new', id, 'queued', false}
end

function op.begin(now, id, claim, worker, alone)
  local job = load_job(id)
  if not job then
    for _, priority in ipairs(C.priorities) do redis.call('LREM', popped_key(priority), 0, id) end
    return false
  end
  if not (job.state == 'running' and job.claim == claim) then
    -- RQ's dequeue left an entry in the intermediate list: without it another worker has the job,
    -- or will have it.
    local tickets = redis.call('LREM', popped_key(job.priority), 0, id)
    redis.call('HDEL', P .. 'popped', id)
    redis.call('ZREM', ranks_key(job.priority), id)
    if job.state ~= 'queued' or tickets == 0 then return false end
    refill(job.priority)
    if too_late(job, now) then return {'expired', 'deadline_passed'} end
    local crashed = workers_crashed(job.file_sha ~= '' and job.file_sha or job.claimed_sha)
    if crashed >= C.quarantine_after then
      quarantine(job, now, 'decoder_crashed', 'this file crashed ' .. crashed ..
        ' workers in other jobs; `ralf quarantine retry` clears its count')
      return {'quarantined', 'decoder_crashed'}
    end
    job.attempts, job.worker = redis.call('HINCRBY', job_key(id), 'attempts', 1), worker
    redis.call('HSET', job_key(id), 'state', 'running', 'claim', claim, 'worker', worker,
      'alone', alone, 'started_at', now)
    redis.call('HDEL', job_key(id), 'next_attempt_at')
    redis.call('ZREM', P .. 'waiting:' .. job.priority, id)
    redis.call('ZADD', P .. 'running:' .. job.priority, now + C.lease, id)
    show_to_rq(job, 'started')
    notify(id, 'running')
  end
  return {redis.call('HGET', job_key(id), 'document'), job.attempts, job.retries, job.run_alone}
end

function op.beat(now, id, claim, alone, file_sha, progress, partial)
  local key = job_key(id)
  local seen = redis.call('HMGET', key, 'state', 'claim', 'cancel', 'priority')
  if seen[1] ~= 'running' or seen[2] ~= claim then return 'lost' end
  redis.call('ZADD', P .. 'running:' .. seen[4], now + C.lease, id)
  if alone ~= '' then redis.call('HSET', key, 'alone', alone) end
  if file_sha ~= '' then redis.call('HSET', key, 'file_sha', file_sha) end
  if progress ~= '' then redis.call('HSET', key, 'progress', progress) end
  if partial ~= '' then redis.call('HSET', key, 'partial', partial) end
  if progress ~= '' or partial ~= '' then notify(id, 'running') end
  return seen[3] and 'cancel' or 'go_on'
end

-- `end` is a word of Lua.
function op.finish(now, id, claim, state, facts, failure, verdict, evidence, digest, file_sha)
  local job = held(id, claim)
  if not job then return 0 end
  if file_sha and file_sha ~= '' then job.file_sha = file_sha end
  local function given(text) return text ~= '' and text end
  finish(job, now, state, facts, given(failure), given(verdict), given(evidence), digest)
  return 1
end

function op.hand_back(now, id, claim, delay)
  local job = held(id, claim)
  return job and requeue(job, now, tonumber(delay), true) or 'lost'
end

function op.retry(now, id, claim, delay, failure)
  local job = held(id, claim)
  if not job then return 'lost' end
  if tonumber(job.retries) >= C.retries then
    return finish(job, now, 'failed', failure, failure)
  end
  redis.call('HINCRBY', job_key(id), 'retries', 1)
  return requeue(job, now, tonumber(delay), false, failure)
end

function op.crashed(now, id, claim, code, message, detail, alone, file_sha, blame_file)
  local job = held(id, claim)
  if not job then return 'lost' end
  note_file(job, file_sha)
  job.alone = alone
  return crash(job, now, code, message, detail, blame_file == '1')
end

function op.cancel(now, id)
  local job = load_job(id)
  if not job then return false end
  if job.state == 'queued' then
    local ended = fail(job, now, 'cancelled', 'cancelled', 'cancelled by the client before it ran')
    unlist(job)
    return ended
  elseif job.state == 'running' then
    redis.call('HSET', job_key(id), 'cancel', now)
    notify(id, 'running')
  end
  return job.state
end

-- A backfill has written the job's end into its ledger. A million verdicts that are kept for a month
-- would fill Redis' memory, so what is stored about this one goes soon.
function op.release(now, id)
  local job = load_job(id)
  if not job or job.priority ~= 'backfill' or job.state == 'queued' or job.state == 'running' then
    return 0
  end
  for _, key in ipairs({job_key(id), P .. 'verdict:' .. id, P .. 'evidence:' .. id,
    'rq:job:' .. id, P .. 'token:' .. job.tenant .. ':' .. job.token}) do
    redis.call('EXPIRE', key, C.release_ttl)
  end
  return 1
end

function op.refill(now, priority) return refill(priority) end

-- RQ's dequeue as a script: with its memory full Redis refuses BLMOVE, and a script may go on.
function op.pop(now, priority)
  refill(priority)
  return redis.call('LMOVE', queue_key(priority), popped_key(priority), 'LEFT', 'RIGHT')
end
