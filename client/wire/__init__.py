"""Between a site's messenger and its worker: the messages (`worker.proto`), their conversion, the call."""
