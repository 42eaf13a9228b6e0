"""Real chat templates x kinds of conversation, judged by a judge that knows nothing of the encoder."""
