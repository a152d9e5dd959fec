"""Demo: what people touch, a Gradio app over the public face of `switchkd.serve`."""
