//go:build !system

package host

func prepare() {} // only the system tests need something from outside
