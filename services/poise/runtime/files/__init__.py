"""Files that survive crashes, scratch folders, and the cache folder."""
