"""Weight pushes: receive, check and stage a new policy version, then hand it to the engine."""
