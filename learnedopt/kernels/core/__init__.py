"""What is no rule's: backends, the choice between them, state, and what programs of rules are made of."""
