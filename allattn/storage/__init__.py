"""Files on this machine or in a storage bucket, and the checkpoints that lie there."""
