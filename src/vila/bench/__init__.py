"""Measurements that users run themselves: decoding, quality after quantization, serving."""
