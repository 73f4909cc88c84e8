"""CPU kernels in C++: built with the machine's own compiler on first use (:func:`.build.load`)."""
