"""What a Redis or Valkey server runs for the catalog: each call is one script, so that it is atomic and one round trip.

    {scope}meta     hash    epoch, seq, bytes, complete, token, revision
    {scope}blocks   hash    key -> packed entry
    {scope}changes  stream  seq-0 -> k (key), v (packed entry, or empty for a removal)
    {scope}claims   hash    name -> "token expires-in-ms holder"

    {scope}documents:FOLDER   hash        name -> body
    {scope}revisions:FOLDER   sorted set  name, by revision
    {scope}expiries:FOLDER    sorted set  name, by expires-in-ms

The braces put all of them in one slot of a cluster. Values of ``meta`` are written as decimal text. ``ARGV[1]`` of each script is
a fresh name, for an epoch that it may have to begin.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha1


@dataclass(frozen=True, slots=True)
class Script:
    """The source, and the name under which the server keeps it."""

    body: str
    source: str = field(init=False)
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        source = _PROLOGUE + self.body
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "sha", sha1(source.encode(), usedforsecurity=False).hexdigest())


# An index without its meta, or the other way round, is what a flush, an eviction or a damaged replica leaves behind.
_PROLOGUE = """
local meta, blocks, changes, claims = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local function get(name) return tonumber(redis.call('HGET', meta, name) or 0) end
local function set(name, value) redis.call('HSET', meta, name, string.format('%.0f', value)) end

local function begin_again()
  set('complete', 0)
  redis.call('HSET', meta, 'epoch', ARGV[1])
  return ARGV[1]
end

local function begin_epoch()
  redis.call('UNLINK', blocks, changes)
  set('seq', 0)
  set('bytes', 0)
  return begin_again()
end

local function size(value)
  if not value or #value ~= 46 then return 0 end
  return 4096 + math.ceil(struct.unpack('<I4', value) / 4096) * 4096
end

local epoch = redis.call('HGET', meta, 'epoch')
if not epoch or (get('bytes') > 0 and redis.call('EXISTS', blocks) == 0) then epoch = begin_epoch() end
"""

# ARGV: changes to keep, then key and packed entry (empty: remove) in turn.
RECORD = Script("""
local function adds_nothing(after, before)
  if not before or #before ~= #after or string.sub(before, 5, 20) ~= string.sub(after, 5, 20) then return false end
  if string.sub(after, 21, 22) == '\\0\\0' then return size(before) == size(after) end
  return string.sub(before, 1, 42) == string.sub(after, 1, 42)
end
local seq, bytes = get('seq'), get('bytes')
for i = 3, #ARGV, 2 do
  local key, after = ARGV[i], ARGV[i + 1]
  local before = redis.call('HGET', blocks, key)
  local changed
  if after == '' then
    changed = before
    if changed then redis.call('HDEL', blocks, key) end
  else
    changed = not adds_nothing(after, before)
    if changed then redis.call('HSET', blocks, key, after) end
  end
  if changed then
    seq = seq + 1
    bytes = bytes + size(after) - size(before)
    redis.call('XADD', changes, 'MAXLEN', '~', ARGV[2], string.format('%.0f-0', seq), 'k', key, 'v', after)
  end
end
set('seq', seq)
set('bytes', bytes)
""")

# ARGV: the cursor (epoch, since, page or '-'), limit.
FOLLOW = Script("""
local their_epoch, since, page, limit = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local seq = get('seq')
if their_epoch == epoch and since > seq then epoch = begin_again() end
local first = redis.call('XRANGE', changes, '-', '+', 'COUNT', 1)[1]
local oldest = first and tonumber(string.match(first[1], '^%d+')) or seq + 1
local restarted = their_epoch ~= epoch or (since < seq and oldest > since + 1)
if restarted then since, page = seq, '0' end
local found = {}
if page ~= '-' then
  local scanned = redis.call('HSCAN', blocks, page, 'COUNT', limit)
  page, found = scanned[1], scanned[2]
  if page == '0' then page = '-' end
else
  for _, item in ipairs(redis.call('XRANGE', changes, string.format('%.0f-0', since + 1), '+', 'COUNT', limit)) do
    since = tonumber(string.match(item[1], '^%d+'))
    found[#found + 1] = item[2][2]
    found[#found + 1] = item[2][4]
  end
end
local caught_up = page == '-' and since == seq
return {epoch, since, page, restarted and 1 or 0, caught_up and 1 or 0, get('complete'), get('bytes'), found}
""")

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_CLAIMS = (
    _NOW
    + """
local function living()
  local all, found = redis.call('HGETALL', claims), {}
  for i = 1, #all, 2 do
    local token, expires, holder = string.match(all[i + 1], '^(%d+) (%d+) (.*)$')
    if token and tonumber(expires) > now then
      found[#found + 1] = {all[i], holder, tonumber(token), tonumber(expires)}
    else
      redis.call('HDEL', claims, all[i])
    end
  end
  return found
end
"""
)

# ARGV: name, holder, milliseconds (0: give back).
CLAIM = Script(
    _CLAIMS
    + """
local name, holder, lasts = ARGV[2], ARGV[3], tonumber(ARGV[4])
local token, expires, held_by = string.match(redis.call('HGET', claims, name) or '', '^(%d+) (%d+) (.*)$')
local held = token and tonumber(expires) > now
if held and held_by ~= holder then return false end
if lasts == 0 then
  redis.call('HDEL', claims, name)
  return false
end
if not held then
  living()
  token = redis.call('HINCRBY', meta, 'token', 1)
end
redis.call('HSET', claims, name, string.format('%.0f %.0f %s', token, now + lasts, holder))
return {tonumber(token), now + lasts}
"""
)

STATUS = Script(
    _CLAIMS + "return {epoch, get('complete'), redis.call('HLEN', blocks), get('bytes'), get('seq'), living()}"
)

RESET = Script("return begin_epoch()")

# ARGV: the epoch that is complete.
COMPLETE = Script("""
if epoch ~= ARGV[2] then return 0 end
set('complete', 1)
return 1
""")

# What has expired goes first, so that nothing after this meets it.
_DOCUMENTS = (
    _NOW
    + """
local bodies, revisions, expiries = KEYS[5], KEYS[6], KEYS[7]

local function drop(names)
  for _, name in ipairs(names) do
    redis.call('HDEL', bodies, name)
    redis.call('ZREM', revisions, name)
    redis.call('ZREM', expiries, name)
  end
end

drop(redis.call('ZRANGEBYSCORE', expiries, '-inf', now))
local newest = redis.call('ZRANGE', revisions, -1, -1, 'WITHSCORES')[2]
local revision = math.max(get('revision'), tonumber(newest or 0))
"""
)

# ARGV: name, body, milliseconds (0: remove), expected revision (empty: any), documents to keep.
PUT_DOCUMENT = Script(
    _DOCUMENTS
    + """
local name, body, lasts, expected, most = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
if expected ~= '' and tonumber(expected) ~= tonumber(redis.call('ZSCORE', revisions, name) or 0) then return false end
revision = revision + 1
set('revision', revision)
if lasts == 0 then
  drop({name})
else
  redis.call('HSET', bodies, name, body)
  redis.call('ZADD', revisions, string.format('%.0f', revision), name)
  redis.call('ZADD', expiries, string.format('%.0f', now + lasts), name)
  drop(redis.call('ZRANGE', expiries, 0, -1 - most))
end
return revision
"""
)

# ARGV: the mark (epoch, revision), documents and bytes in an answer.
READ_DOCUMENTS = Script(
    _DOCUMENTS
    + """
local since, limit, room, restarted = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), 0
if ARGV[2] ~= epoch or since > revision then since, restarted = 0, 1 end
local above = string.format('(%.0f', since)
local found = {}
local names = redis.call('ZRANGEBYSCORE', revisions, above, '+inf', 'WITHSCORES', 'LIMIT', 0, limit)
for i = 1, #names, 2 do
  if room <= 0 then break end
  local body, expires = redis.call('HGET', bodies, names[i]) or '', redis.call('ZSCORE', expiries, names[i]) or 0
  since, room = tonumber(names[i + 1]), room - #body
  found[#found + 1] = {names[i], body, since, tonumber(expires)}
end
local caught_up = #found < limit and 2 * #found == #names
return {epoch, caught_up and revision or since, restarted, caught_up and 1 or 0, found}
"""
)
