"""What a task trains on: a module around the model that turns a batch into its loss, one file a task."""
