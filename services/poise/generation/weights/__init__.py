"""Weight pushes: validate, receive and stage the parameters of a new policy version."""
