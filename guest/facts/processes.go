package facts

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"foothold/protocol/audit"

	"golang.org/x/sys/unix"
)

// kthread is PF_KTHREAD of the kernel's include/linux/sched.h.
const kthread = 0x00200000

// processes lists user processes and counts kernel threads.
func (g *Gatherer) processes(r *audit.Report) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, kernel, err := g.process(pid)
		switch {
		case gone(err): // it ended meanwhile
		case err != nil:
			return fmt.Errorf("process %d: %w", pid, err)
		case kernel:
			r.Threads++
		case p != nil:
			r.Processes = append(r.Processes, *p)
		}
	}
	slices.SortFunc(r.Processes, func(a, b audit.Process) int { return a.PID - b.PID })
	return nil
}

func gone(err error) bool {
	return os.IsNotExist(err) || err == unix.ESRCH || strings.Contains(fmt.Sprint(err), unix.ESRCH.Error())
}

func (g *Gatherer) process(pid int) (p *audit.Process, kernel bool, err error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, false, err
	}
	state, parent, flags, err := parseStat(string(stat))
	if err != nil {
		return nil, false, err
	}
	if flags&kthread != 0 {
		return nil, true, nil
	}
	if state == "Z" { // ended, waits for its parent; it runs nothing
		return nil, false, nil
	}
	p = &audit.Process{PID: pid, Parent: parent}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, false, err
	}
	p.UID = int(st.Uid)
	if p.Exe, err = os.Readlink(filepath.Join(dir, "exe")); err != nil {
		return nil, false, err
	}
	args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return nil, false, err
	}
	if s := strings.TrimSuffix(string(args), "\x00"); s != "" {
		p.Args = strings.Split(s, "\x00")
	}
	f, err := os.Open(filepath.Join(dir, "exe"))
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	p.SHA256, err = g.digests.of(f)
	return p, false, err
}

// parseStat reads fields 3, 4 and 9 of /proc/PID/stat (proc(5)); the name in field 2
// may hold blanks and brackets.
func parseStat(text string) (state string, parent int, flags uint64, err error) {
	end := strings.LastIndexByte(text, ')')
	if end < 0 {
		return "", 0, 0, fmt.Errorf("malformed stat")
	}
	f := strings.Fields(text[end+1:])
	if len(f) < 7 {
		return "", 0, 0, fmt.Errorf("malformed stat")
	}
	if parent, err = strconv.Atoi(f[1]); err != nil {
		return "", 0, 0, fmt.Errorf("malformed stat")
	}
	flags, err = strconv.ParseUint(f[6], 10, 64)
	return f[0], parent, flags, err
}
