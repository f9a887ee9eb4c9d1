"""Images and videos: loading within limits, the pixel transform, and HTTP downloads with an SSRF check."""
