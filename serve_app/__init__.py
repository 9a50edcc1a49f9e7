"""HTTP and text: the OpenAI API of one model, inside a Ray Serve replica."""
