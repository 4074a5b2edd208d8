"""Meta-training on Ray: tasks and their data, batches, the learner, its loop, checkpoints, the job, and its plan."""
