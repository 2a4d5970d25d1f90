"""What only the Redis server can check and change in one step: Lua."""

# What a stream holds: entries, and bytes of memory. All nodes are counted, not a sample: entries differ in size.
_HELD = """
local function held(key)
  return redis.call('XLEN', key), redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) or 0
end
"""

# The whole batch or nothing, and never over the limit: only the server can check and append in one step.
# ARGV: most entries, most bytes, payloads. Answers {1}, or {0, length, bytes} when they do not fit.
PUBLISH = (
    _HELD
    + """
local more = 0
for i = 3, #ARGV do more = more + #ARGV[i] end
local length, bytes = held(KEYS[1])
if length + #ARGV - 2 > tonumber(ARGV[1]) or bytes + more > tonumber(ARGV[2]) then return {0, length, bytes} end
for i = 3, #ARGV do redis.call('XADD', KEYS[1], '*', 'group', ARGV[i]) end
return {1}
"""
)

# The id alone: an entry may be large.
NEWEST = """
local found = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return found[1] and found[1][1]
"""

# ARGV: an entry. Answers how many there are that are not newer, 0 or 1.
HOLDS = "return #redis.call('XRANGE', KEYS[1], '-', ARGV[1], 'COUNT', 1)"

# ARGV: consumer group, entry, most letters, most bytes of them, and the letter's fields with their values.
DEAD_LETTER = (
    _HELD
    + """
redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[3], '*', unpack(ARGV, 5))
local letters, bytes = held(KEYS[2])
while letters > 1 and bytes > tonumber(ARGV[4]) do
  redis.call('XTRIM', KEYS[2], 'MAXLEN', letters - 1)
  letters, bytes = held(KEYS[2])
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
"""
)

# ARGV: most entries, most bytes, letters.
# Answers {1}, or {0, length, bytes} when they do not fit, {-1, id} for a letter that is gone, {-2, id} for a cut one.
REPLAY = (
    _HELD
    + """
local payloads, more = {}, 0
for i = 3, #ARGV do
  local found = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])
  if #found == 0 then return {-1, ARGV[i]} end
  local fields = {}
  for j = 1, #found[1][2], 2 do fields[found[1][2][j]] = found[1][2][j + 1] end
  if fields['is_whole'] ~= '1' then return {-2, ARGV[i]} end
  payloads[i] = fields['group']
  more = more + #payloads[i]
end
local length, bytes = held(KEYS[1])
if length + #ARGV - 2 > tonumber(ARGV[1]) or bytes + more > tonumber(ARGV[2]) then return {0, length, bytes} end
for i = 3, #ARGV do
  redis.call('XADD', KEYS[1], '*', 'group', payloads[i])
  redis.call('XDEL', KEYS[2], ARGV[i])
end
return {1}
"""
)
