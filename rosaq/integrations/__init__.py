"""Other people's runtimes: each module here teaches one of them to run rosaq checkpoints."""
