package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"foothold/lab"
	"foothold/lab/control"
)

func labExec(open openLab) *cobra.Command {
	return &cobra.Command{
		Use:     "exec PLACE -- COMMAND [ARGUMENT...]",
		Short:   "Run a command from a place of the lab",
		Example: "  foothold lab exec external -- nft list ruleset",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			return execIn(cmd.Context(), state, args[0], args[1:])
		},
	}
}

func labFetch(open openLab) *cobra.Command {
	var from string
	cmd := &cobra.Command{
		Use:     "fetch URL",
		Short:   "Fetch a page from a place of the lab",
		Example: "  foothold lab fetch http://10.80.0.20/",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			self, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find own program: %w", err)
			}
			return execIn(cmd.Context(), state, from, []string{self, "lab", "get", args[0]})
		},
	}
	cmd.Flags().StringVar(&from, "from", lab.Tenant, "the place that asks")
	return cmd
}

// execIn runs a command in a place with this process's standard files, passes
// signals on, and ends with the command's exit code.
func execIn(ctx context.Context, state lab.State, place string, args []string) error {
	cwd, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("find working directory: %w", err)
	}
	if strings.Contains(args[0], "/") && !filepath.IsAbs(args[0]) {
		args[0] = filepath.Join(cwd, args[0])
	}
	c, err := control.Dial(state.Run())
	if err != nil {
		return fmt.Errorf("%w: `foothold lab up --state %s` starts it", err, state.Dir)
	}
	defer c.Close()
	req := control.Request{Op: control.OpExec, Name: place, Args: args, Env: os.Environ(), Dir: cwd}
	if err := c.Send(req, os.Stdin, os.Stdout, os.Stderr); err != nil {
		return err
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	go func() {
		for sig := range signals {
			c.Send(control.Signal{Signal: int(sig.(syscall.Signal))})
		}
	}()
	var reply control.Reply
	if _, err := c.Receive(&reply); err != nil {
		return fmt.Errorf("the lab ended: %w", err)
	}
	if reply.Error != "" {
		return &exitError{max(reply.Code, exitFailure), errors.New(reply.Error)}
	}
	if reply.Code != 0 {
		return &exitError{reply.Code, nil}
	}
	return nil
}

// fetchLimit bounds a fetched page in bytes.
const fetchLimit = 16 << 20

func getPage(ctx context.Context, w io.Writer, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return &exitError{exitUsage, fmt.Errorf("fetch: %w", err)}
	}
	client := &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext}}
	rsp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	defer rsp.Body.Close()
	if _, err := io.Copy(w, io.LimitReader(rsp.Body, fetchLimit)); err != nil {
		return fmt.Errorf("fetch %s: %w", url, err)
	}
	if rsp.StatusCode != http.StatusOK {
		return fmt.Errorf("fetch %s: %s", url, rsp.Status)
	}
	return nil
}
