"""Training: pictures and conversations in, a standard Hugging Face checkpoint folder out."""
