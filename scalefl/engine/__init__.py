"""The only importer of accelerate, deepspeed and torch.distributed: every collective sits here."""
