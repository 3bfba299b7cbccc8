"""What is no part of training, testing or upscaling: measuring and reporting."""
