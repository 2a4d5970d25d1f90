"""What only the Redis server can check and change in one step: Lua."""

# The whole batch or nothing, and never over the limit: only the server can check and append in one step.
PUBLISH = """
local length = redis.call('XLEN', KEYS[1])
if length + #ARGV - 1 > tonumber(ARGV[1]) then return {0, length} end
for i = 2, #ARGV do redis.call('XADD', KEYS[1], '*', 'group', ARGV[i]) end
return {1, length + #ARGV - 1}
"""

# Answers {1}, or {0, length} when they do not fit, {-1, id} for a letter that is gone, {-2, id} for one that was cut.
REPLAY = """
local length = redis.call('XLEN', KEYS[1])
if length + #ARGV - 1 > tonumber(ARGV[1]) then return {0, length} end
local payloads = {}
for i = 2, #ARGV do
  local found = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])
  if #found == 0 then return {-1, ARGV[i]} end
  local fields = {}
  for j = 1, #found[1][2], 2 do fields[found[1][2][j]] = found[1][2][j + 1] end
  if fields['is_whole'] ~= '1' then return {-2, ARGV[i]} end
  payloads[i] = fields['group']
end
for i = 2, #ARGV do
  redis.call('XADD', KEYS[1], '*', 'group', payloads[i])
  redis.call('XDEL', KEYS[2], ARGV[i])
end
return {1}
"""
