"""What a federation of real nodes needs before its first round: files, keys, checked nodes."""
