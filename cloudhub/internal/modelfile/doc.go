// Package modelfile keeps the model files that edges ask the cloud hub for, by the digest of their content.
package modelfile
