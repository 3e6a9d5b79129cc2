"""The Open Inference Protocol (KServe v2), over REST and gRPC, with the binary tensor and classification
extensions.

`core` knows neither HTTP nor gRPC; `rest` and `grpc` translate to it.
"""
