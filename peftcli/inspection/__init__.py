"""What `peft inspect` finds out about adapters, checkpoints and files of tensors. No torch; numpy only where asked."""
