"""Turns a finished run into measured .tflite files. ``python -m cnnopt.quantize`` starts this. Never needs Horovod."""
