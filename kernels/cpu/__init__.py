"""CPU kernels in C++: brought by the wheel, or built with the machine's own compiler on first use (:func:`.build.load`)."""
