"""Tools that are no part of training, testing or upscaling."""
