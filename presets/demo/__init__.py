"""The bundled demo: a small Llama-shaped model, its tokenizer and a generator of chat messages."""
