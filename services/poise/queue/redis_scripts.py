"""The keys of a stream, and the Lua scripts that check and change them in one step on the server."""

import re


def dead_letter_key(stream: str) -> str:
    """Return the key of a stream's dead letters. In a cluster it is in the slot of the stream.

    Raises:
        ValueError: this stream name has no such key.
    """
    key = f"{stream}:dead" if _hashed(stream) != stream else f"{{{stream}}}:dead"
    if _hashed(key) != _hashed(stream):
        raise ValueError("may have braces only around the part that a cluster hashes, as in {poise}:labels")
    return key


def _hashed(key: str) -> str:
    """Return the part of a key that a cluster hashes: the text in the first braces, unless it is empty."""
    found = re.search(r"\{([^}]*)\}", key)
    return found[1] if found and found[1] else key


# Returns the number of entries of a stream and their bytes of memory. Entries differ in size, so all nodes are counted.
_USAGE = """
local function usage(key)
  return redis.call('XLEN', key), redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) or 0
end
"""

# Appends all payloads or none, never over the limits.
# ARGV: maximum entries, maximum bytes, payloads. Returns {1, newest id}, or {0, length, bytes} if they do not fit.
PUBLISH = (
    _USAGE
    + """
local more = 0
for i = 3, #ARGV do more = more + #ARGV[i] end
local length, bytes = usage(KEYS[1])
if length + #ARGV - 2 > tonumber(ARGV[1]) or bytes + more > tonumber(ARGV[2]) then return {0, length, bytes} end
local id = ''
for i = 3, #ARGV do id = redis.call('XADD', KEYS[1], '*', 'group', ARGV[i]) end
return {1, id}
"""
)

# ARGV: consumer group, entries. A script, not a transaction: it needs only the permissions that EXAMINE checks.
ACK = """
for i = 2, #ARGV do
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
  redis.call('XDEL', KEYS[1], ARGV[i])
end
"""

# Returns only the id, because an entry may be large.
NEWEST = """
local found = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return found[1] and found[1][1]
"""

# ARGV: an entry. Returns 1 if it or an older entry exists, else 0.
HAS_UP_TO = "return #redis.call('XRANGE', KEYS[1], '-', ARGV[1], 'COUNT', 1)"

# ARGV: consumer group, entry, maximum letters, maximum bytes, and the fields of the new letter with their values.
DEAD_LETTER = (
    _USAGE
    + """
redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[3], '*', unpack(ARGV, 5))
local letters, bytes = usage(KEYS[2])
while letters > 1 and bytes > tonumber(ARGV[4]) do
  redis.call('XTRIM', KEYS[2], 'MAXLEN', letters - 1)
  letters, bytes = usage(KEYS[2])
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
"""
)

# ARGV: maximum entries, maximum bytes, letters.
# Returns {1}; {0, length, bytes} if they do not fit; {-1, id} if a letter is missing; {-2, id} if one is truncated.
REPLAY = (
    _USAGE
    + """
local payloads, more = {}, 0
for i = 3, #ARGV do
  local found = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])
  if #found == 0 then return {-1, ARGV[i]} end
  local fields = {}
  for j = 1, #found[1][2], 2 do fields[found[1][2][j]] = found[1][2][j + 1] end
  if fields['is_whole'] ~= '1' or not fields['group'] then return {-2, ARGV[i]} end
  payloads[i] = fields['group']
  more = more + #payloads[i]
end
local length, bytes = usage(KEYS[1])
if length + #ARGV - 2 > tonumber(ARGV[1]) or bytes + more > tonumber(ARGV[2]) then return {0, length, bytes} end
for i = 3, #ARGV do
  redis.call('XADD', KEYS[1], '*', 'group', payloads[i])
  redis.call('XDEL', KEYS[2], ARGV[i])
end
return {1}
"""
)

_STATE = """
local function fields(reply)
  local found = {}
  for i = 1, #reply, 2 do found[reply[i]] = reply[i + 1] end
  return found
end

local function state(stream, dead, group)
  local kinds = {redis.call('TYPE', stream)['ok'], redis.call('TYPE', dead)['ok']}
  local length, last, has_group, pending, unread, letters = 0, '', 0, 0, -1, 0
  if kinds[1] == 'stream' then
    local facts = fields(redis.call('XINFO', 'STREAM', stream))
    length, last = facts['length'], facts['last-generated-id']
    for _, reply in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      local own = fields(reply)
      if own['name'] == group then
        has_group, pending = 1, own['pending']
        local added, read = facts['entries-added'], own['entries-read']
        if own['last-delivered-id'] == '0-0' and length == added then read = 0 end
        if added and read then unread = added - read end
      end
    end
  end
  if kinds[2] == 'stream' then
    local facts = fields(redis.call('XINFO', 'STREAM', dead))
    letters = facts['entries-added'] or facts['length']
  end
  return {kinds[1], kinds[2], length, last, has_group, pending, unread, letters}
end
"""

# KEYS: stream, dead letters. ARGV: consumer group. Returns the type of each key; the stream's length and newest id;
# whether the group exists, its pending entries, and its unread entries, -1 if the server does not count them (before
# Redis 7); and the number of letters ever written. `lag` is not used: it counts trimmed entries as read.
STATE = _STATE + "return state(KEYS[1], KEYS[2], ARGV[1])"

# The same, after trying every command of the queue with arguments that change nothing, to detect missing permissions.
# ARGV: consumer group, consumer. Returns {denied commands, state}.
EXAMINE = (
    _STATE
    + """
local denied = {}
local function try(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  local text = type(reply) == 'table' and reply['err'] or ''
  if string.find(text, 'ACL') or string.find(text, 'permission') or string.find(text, "can't") then
    denied[#denied + 1] = command .. ' ' .. key .. ': ' .. text
  end
end
for _, key in ipairs(KEYS) do
  try('TYPE', key)
  try('XLEN', key)
  try('XRANGE', key, '0-1', '0-1')
  try('XREVRANGE', key, '0-1', '0-1')
  try('XADD', key, 'NOMKSTREAM', '0-0', 'group', '')
  try('XDEL', key, '0-1')
end
try('XGROUP', 'CREATE', KEYS[1], ARGV[1], 'no id')
try('XINFO', 'STREAM', KEYS[1])
try('XINFO', 'GROUPS', KEYS[1])
try('MEMORY', 'USAGE', KEYS[1])
try('XACK', KEYS[1], ARGV[1], '0-1')
try('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', '1', 'STREAMS', KEYS[1], '9007199254740991-0')
try('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], '9007199254740991', '0-0', 'COUNT', '1')
try('XTRIM', KEYS[2], 'MAXLEN', '9223372036854775807')
if #denied > 0 then return {denied, {}} end
return {denied, state(KEYS[1], KEYS[2], ARGV[1])}
"""
)

# KEYS: the dead letters of earlier releases, and their present key. Moves all letters; returns their number.
MOVE_LETTERS = """
local letters = redis.call('XLEN', KEYS[1])
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('RENAME', KEYS[1], KEYS[2])
  return letters
end
for _, letter in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
  redis.call('XADD', KEYS[2], '*', unpack(letter[2]))
end
redis.call('DEL', KEYS[1])
return letters
"""
