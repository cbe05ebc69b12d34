// ProcessGroupGloo.hpp of the torch wheel includes gloo's headers, which the wheel leaves out. It needs their names only.
