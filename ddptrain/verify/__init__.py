"""Shows that a user's model, task and data keep the law: where a run executes does not matter."""
