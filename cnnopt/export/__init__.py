"""From a finished run to measured .tflite files. Never needs Horovod; ``python -m cnnopt.quantize`` is the way in."""
