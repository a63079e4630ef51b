"""What every test file shares: hypothesis sets no deadline, for a busy machine is slow and not wrong."""

from hypothesis import settings

settings.register_profile("course", deadline=None)
settings.load_profile("course")
