"""One file for each verb: paths and options in, a frozen result out; prints nothing."""
