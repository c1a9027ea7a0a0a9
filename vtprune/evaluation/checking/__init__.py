"""Whether a pruned model gives what the same model gives with the dropped tokens masked."""
