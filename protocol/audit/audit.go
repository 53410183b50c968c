// Package audit is what a guest reports of itself: raw facts of the live machine,
// gathered by the agent, judged by the tenant against its own expectation. The agent
// judges nothing.
package audit

import "foothold/protocol/digest"

// Stages at which the machine is audited.
const (
	Initramfs = "initramfs" // first audit, before any secret
	OS        = "os"        // second audit and later ones
)

// MaxReport bounds an encoded report in bytes.
const MaxReport = 2 << 20

// Report is one audit's facts. Lists are sorted so that reports compare.
type Report struct {
	Stage      string      `json:"stage"`
	Nonce      []byte      `json:"nonce"`   // of the audit request
	Kernel     string      `json:"kernel"`  // uname -r
	Cmdline    string      `json:"cmdline"` // /proc/cmdline
	Tainted    uint64      `json:"tainted"` // /proc/sys/kernel/tainted
	Hostname   string      `json:"hostname"`
	Files      []File      `json:"files"`      // executables, libraries and configuration in memory (initramfs) or in the writable overlay (os)
	Processes  []Process   `json:"processes"`  // user processes; kernel threads are counted
	Threads    int         `json:"threads"`    // kernel threads
	Modules    []string    `json:"modules"`    // loaded kernel modules
	Listeners  []Listener  `json:"listeners"`  // TCP in LISTEN, UDP bound, raw, packet, vsock
	Mounts     []Mount     `json:"mounts"`     //
	Users      []User      `json:"users"`      // /etc/passwd
	Disks      []Disk      `json:"disks"`      // block devices, device-mapper tables without keys
	Interfaces []Interface `json:"interfaces"` //
	Routes     []string    `json:"routes"`     // "default dev wg0", "10.81.0.20 via 10.82.0.1 dev eth0"
	Swaps      []string    `json:"swaps"`
}

// File is a file with its content's digest.
type File struct {
	Path   string        `json:"path"`
	Mode   uint32        `json:"mode"` // permission and type bits as in stat(2)
	SHA256 digest.SHA256 `json:"sha256"`
}

// Process is a user process.
type Process struct {
	PID    int           `json:"pid"`
	Parent int           `json:"parent"`
	UID    int           `json:"uid"`
	Exe    string        `json:"exe"`    // /proc/PID/exe
	SHA256 digest.SHA256 `json:"sha256"` // of the executable
	Args   []string      `json:"args"`
}

// Listener is an open port.
type Listener struct {
	Proto   string `json:"proto"` // tcp, tcp6, udp, udp6, raw, packet, vsock, unix are not mixed
	Address string `json:"address"`
	Port    int    `json:"port"`
	Exe     string `json:"exe"`
}

// Mount is one line of /proc/self/mountinfo.
type Mount struct {
	Source  string `json:"source"`
	Target  string `json:"target"`
	Type    string `json:"type"`
	Options string `json:"options"`
}

// User is one line of /etc/passwd; Locked says that no password opens it.
type User struct {
	Name   string `json:"name"`
	UID    int    `json:"uid"`
	Shell  string `json:"shell"`
	Locked bool   `json:"locked"`
}

// Disk is a block device. A device-mapper table names the devices beneath by number,
// so each device says its own.
type Disk struct {
	Name     string `json:"name"`             // vda, dm-0
	Number   string `json:"number"`           // "254:0", /sys/block/NAME/dev
	Mapped   string `json:"mapped,omitempty"` // device-mapper name, /sys/block/NAME/dm/name
	Size     int64  `json:"size"`             // bytes
	ReadOnly bool   `json:"read_only"`
	Table    string `json:"table,omitempty"` // device-mapper table as `dmsetup table` prints it, one target a line, keys shown as "-"
}

// Interface is a network interface.
type Interface struct {
	Name      string   `json:"name"`
	MAC       string   `json:"mac"`
	Addresses []string `json:"addresses"`
	Up        bool     `json:"up"`
}
