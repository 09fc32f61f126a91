"""What every layer does: measures on any model that is a stack of layers, sparsekit's or Hugging Face's."""
