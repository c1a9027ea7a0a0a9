"""Does the answer survive? Quality of pruned answers beside the unpruned model's."""
