//go:build !amd64

package main

import "errors"

func call32() error { return errors.New("only amd64 has them beside its own") }
