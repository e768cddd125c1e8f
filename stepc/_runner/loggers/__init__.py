"""The loggers: a progress bar, files of lines, TensorBoard, a picture."""
