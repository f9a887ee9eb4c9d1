"""Training: trainer, data stream, FSDP2, loss, optimizer, LoRA, checkpoints, metrics, trackers, model card."""
