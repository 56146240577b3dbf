"""For tests of this project and of what is built on it: conformance suites, fakes, servers, small models."""
