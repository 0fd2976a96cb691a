"""What the student learns from: divergences and their fused, chunked evaluation."""
