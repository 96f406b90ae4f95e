from hypothesis import settings

# A first example often pays for an import or a busy machine: no test here asserts how long anything takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
