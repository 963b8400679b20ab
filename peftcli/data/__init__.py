"""From files to tokens: readers, formats, chat templates with the loss mask, and batches."""
