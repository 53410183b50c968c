package resident

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"foothold/internal/command"
	"foothold/protocol/agentmsg"
)

// unit is the workload's.
const unit = "foothold-workload.service"

// Places of the workload's unit.
const (
	cgroupEvents = "/sys/fs/cgroup/system.slice/" + unit + "/cgroup.events"
	envFile      = Dir + "/workload.env"
)

// systemd runs the workload as a transient unit, under a user of its own that exists
// only while it runs, and with as little as a network service needs.
type systemd struct{}

func properties(w *agentmsg.Workload) []string {
	p := []string{
		"DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "PrivateDevices=yes",
		"ProtectKernelTunables=yes", "ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes", "ProtectClock=yes",
		"ProtectHostname=yes", "ProtectProc=invisible", "RestrictNamespaces=yes", "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes",
		"RestrictAddressFamilies=AF_INET AF_UNIX", "SystemCallArchitectures=native", "StateDirectory=workload", "UMask=0077",
		"Restart=on-failure", "RestartSec=1", "EnvironmentFile=" + envFile,
	}
	if w.Port > 0 && w.Port < 1024 {
		return append(p, "CapabilityBoundingSet=CAP_NET_BIND_SERVICE", "AmbientCapabilities=CAP_NET_BIND_SERVICE")
	}
	return append(p, "CapabilityBoundingSet=")
}

// Start also checks that the program can be executed at all, since the unit's own
// complaint would not be as clear.
func (s systemd) Start(ctx context.Context, program string, w *agentmsg.Workload, address string) error {
	info, err := os.Stat(program)
	if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return errors.New("the entry point is no executable file")
	}
	if err := s.Stop(ctx); err != nil {
		return err
	}
	if err := os.WriteFile(envFile, environment(w, address), 0o600); err != nil {
		return fmt.Errorf("write the environment: %w", err)
	}
	args := []string{"--quiet", "--unit=" + unit, "--service-type=exec", "--description=Foothold workload", "--working-directory=" + filepath.Dir(program)}
	for _, p := range properties(w) {
		args = append(args, "--property="+p)
	}
	if err := command.Run(ctx, "systemd-run", append(args, "--", program)...); err != nil {
		return fmt.Errorf("start the workload: %w", err)
	}
	return nil
}

// environment is in the format of EnvironmentFile= (systemd.exec(5)): double quotes,
// with a backslash before what would end or change the value.
func environment(w *agentmsg.Workload, address string) []byte {
	env := append([]string{"PORT=" + strconv.Itoa(w.Port), "ADDRESS=" + address}, w.Env...)
	quote := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "$", `\$`, "`", "\\`")
	var b strings.Builder
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		fmt.Fprintf(&b, "%s=\"%s\"\n", name, quote.Replace(value))
	}
	return []byte(b.String())
}

// State reads the unit's control group, which costs nothing, and asks systemd only
// when no process is left in it.
func (systemd) State(ctx context.Context) (string, string) {
	events, err := os.ReadFile(cgroupEvents)
	if err == nil && strings.Contains(string(events), "populated 1") {
		return running, ""
	}
	out, err := command.Output(ctx, "systemctl", "show", "--property=ActiveState,Result,ExecMainStatus", unit)
	if err != nil {
		return failed, err.Error()
	}
	return stateOf(string(out))
}

// stateOf reads what systemctl shows of the unit.
func stateOf(shown string) (state, detail string) {
	facts := map[string]string{}
	for _, line := range strings.Split(shown, "\n") {
		name, value, _ := strings.Cut(line, "=")
		facts[name] = value
	}
	detail = "result " + facts["Result"] + ", status " + facts["ExecMainStatus"]
	switch {
	case slices.Contains([]string{"active", "activating", "deactivating", "reloading"}, facts["ActiveState"]):
		return running, "" // how it ended is known once it has
	case facts["ActiveState"] == "inactive" && facts["Result"] == "success":
		return exited, detail
	}
	return failed, detail
}

// Stop also forgets a unit that failed, so that its name is free.
func (systemd) Stop(ctx context.Context) error {
	out, err := command.Output(ctx, "systemctl", "show", "--property=LoadState", "--value", unit)
	if err != nil {
		return fmt.Errorf("look for the workload: %w", err)
	}
	if strings.TrimSpace(string(out)) != "loaded" {
		return nil
	}
	if err := command.Run(ctx, "systemctl", "stop", unit); err != nil {
		return fmt.Errorf("stop the workload: %w", err)
	}
	_ = command.Run(ctx, "systemctl", "reset-failed", unit) // fails when there is nothing to forget
	return nil
}
