package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// call32 makes getpid as a 32-bit program does: mov $20, %eax; int $0x80; ret.
func call32() error {
	page, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	copy(page, []byte{0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3})
	if err := unix.Mprotect(page, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		return err
	}
	code := &struct{ entry *byte }{&page[0]} // what a Go function value points to
	(*(*func())(unsafe.Pointer(&code)))()
	return nil
}
