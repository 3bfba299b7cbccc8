"""Other programs: spandrel and with it chaiNNer, and ComfyUI. Nothing in the package imports what is here."""
